"""How a model is judged: texts scored here, tasks asked by EleutherAI's lm-evaluation-harness (package lm_eval)."""
