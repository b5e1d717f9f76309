"""Files and tools of other projects: converters of their SAEs, and Switch SAEs in SAEDashboard."""
