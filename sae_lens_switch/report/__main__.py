"""``python -m sae_lens_switch.report``."""

from sae_lens_switch.report.texts import main

if __name__ == "__main__":
    main()
