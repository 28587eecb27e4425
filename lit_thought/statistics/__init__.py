"""The sums of a fit, stage by stage: across processes and on disk, the preservation statistics beside them."""
