"""Head-to-head ablations: what is compared, running it, and what comes out."""
