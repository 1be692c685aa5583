"""Problems: what needs an operator.

condition   what a condition is, what it reads, and the thresholds
pairs       conditions of a queue and a kind
daemon      conditions of the daemon, of jobs and of workers
cluster     conditions of a cluster
life        when a finding becomes a problem and when it ends; bounds; which problem hides which
board       evaluates the catalogue every few seconds, and has the list that everything else reads
"""
