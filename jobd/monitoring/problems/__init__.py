"""Problems: what needs an operator.

condition          what a condition is, what it reads, and the thresholds
queues_and_kinds   conditions of a queue and a kind
workers            conditions of workers, and of the jobs that they hold
daemon             conditions of the daemon, its disk, webhooks and schedules, and of single jobs
cluster            conditions of a cluster
life               when a finding becomes a problem and when it ends; bounds; which problem hides which
board              evaluates the catalogue every few seconds, and has the list that everything else reads
"""
