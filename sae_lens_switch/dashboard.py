"""Public name of ``interop.saedashboard``: Switch SAEs in SAEDashboard."""

from sae_lens_switch.interop.saedashboard import as_dashboard_sae, main

__all__ = ["as_dashboard_sae", "main"]

if __name__ == "__main__":
    main()
