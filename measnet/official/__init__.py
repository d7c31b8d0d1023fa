"""The variant `official`: what only the authors' released program computes, and its checkpoints."""
