"""What `jobd bench` measures with: a daemon of its own, load from another process, figures. Knows only the wire."""
