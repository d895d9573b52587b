"""The processes of a run: who they are, their nodes, their folder, and whether all of them still answer."""
