"""Does the merged model win, and did it keep what it had: generation, grading, results."""
