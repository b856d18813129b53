"""Data, models and the loop that demo, papers and recipes share. Nothing here is needed to use the library in a loop of your own."""
