"""Public name of ``interop.saedashboard``: Switch SAEs in SAEDashboard."""

if __name__ != "__main__":
    from sae_lens_switch.interop.saedashboard import as_dashboard_sae, main

    __all__ = ["as_dashboard_sae", "main"]

if __name__ == "__main__":
    from sae_lens_switch.interop.saedashboard_help import print_help

    print_help()  # before the imports, which take seconds

    from sae_lens_switch.interop.saedashboard import main
    from sae_lens_switch.saes.registration import register

    register()
    main()
