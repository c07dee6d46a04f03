"""What reports share: tables in every format, the look of plots, a stand-alone HTML page, and provenance."""
