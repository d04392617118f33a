"""From a workload and a cluster to a plan: what may run, what fits, what is fastest, and why."""
