"""From scores to gradients: rewards, advantages, losses, KL control and the optimiser.

inputs.py      what a step is given, checked
samples.py     whether the policy has drawn it, as far as the tokens tell
kl.py          how strongly to hold the policy to its reference
rewards.py     scores [B] and KL penalties to rewards [B, R]
advantages.py  rewards to advantages and returns
corrections.py weights for what another engine, or an older policy, has written
losses.py      per-token losses, and how to average them
bins.py        the loss of a critic that predicts a distribution
algorithms.py  which of these make PPO, RLOO, GRPO, …
objective.py   the loss of an update, put together
adam.py        what is trained, and Adam as torch or TensorFlow computes it
preferences.py what choices among responses say about their rewards
schedule.py    how its learning rate goes
update.py, statistics.py, clock.py    what is known of an update, of a step, of its time
state.py       what a resumed run needs
"""
