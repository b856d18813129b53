"""Other people's training loops: what they need besides an attached run, so that what they save and evaluate is what was trained."""
