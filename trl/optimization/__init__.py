"""From scores to gradients: rewards, advantages, losses, KL control and the optimiser.

kl.py          how strongly to hold the policy to its reference
rewards.py     scores [B] and KL penalties to rewards [B, R]
advantages.py  rewards to advantages and returns
losses.py      per-token losses, and how to average them
adam.py        Adam as TensorFlow computes it
"""
