"""What reports share: tables and the provenance of a figure."""
