"""Files and tools of others."""
