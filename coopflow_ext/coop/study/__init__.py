"""What is done with finished runs: measuring, the paper's experiments, ablations, reports."""
