"""Who runs next. Pure decisions: no torch, no threads, no clock of their own."""
