"""Head-to-head ablations: specify, run, analyse and report comparisons of training runs."""
