"""For people: verbs → client, `serve` → daemon. jobctl starts in ctl.py, jobd in daemon.py."""
