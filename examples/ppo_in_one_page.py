"""PPO for language models on one page: a small GPT-2 learns to write positive film reviews.

    OMP_NUM_THREADS=1 python examples/ppo_in_one_page.py        (2 minutes on one CPU core)

It is the algorithm of Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
(arXiv:1909.08593), from top to bottom, with no trainer: only the formulas of `trl.core` and
`trl.optimization`. Each step does the same four things:

    1  sample     the policy π continues some prompts
    2  evaluate   a classifier scores the texts; π and a frozen copy of it, π_ref, say how likely
                  their tokens are; a value head V guesses the score while the text is written
    3  judge      scores and log-probs become a reward for each token, rewards and values become
                  advantages: how much better a token did than expected
    4  optimise   a few updates of π and V by the clipped losses of PPO

`PPOTrainer` does this for any model, in less memory, in several processes, and with checks.

Shapes, as in trl/core.py: B rows of a batch, Q query tokens (padded on the left), R response tokens
(padded on the right), T = Q + R, V the vocabulary; masks are True where a token counts.
"""

import argparse
import copy
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from trl import starter
from trl.core import (
    logprobs_from_logits,
    mask_after,
    masked_mean,
    masked_whiten,
    position_ids_from_mask,
)
from trl.optimization.advantages import gae
from trl.optimization.kl import AdaptiveKLController
from trl.optimization.losses import clipped_policy_loss, clipped_value_loss, token_mean
from trl.optimization.rewards import token_rewards

# -- settings --------------------------------------------------------------------------------------

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
add = parser.add_argument
add("--steps", type=int, default=60, help="batches of samples")
add("--batch-size", type=int, default=64, help="samples of a step")
add("--minibatch-size", type=int, default=32, help="samples of an update")
add("--ppo-epochs", type=int, default=2, help="passes over the samples of a step")
add("--new-tokens", type=int, default=16, help="tokens of a response")
add("--held-out", type=int, default=256, help="prompts to measure on before and after")
add("--learning-rate", type=float, default=1.5e-4)
add("--kl-target", type=float, default=10.0, help="distance from π_ref, in nats per response")
add("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
disable_progress_bar()  # of loading
GAMMA, LAMBDA = 1.0, 0.95  # a response is short: a later reward counts as much as an early one
CLIPRANGE, CLIPRANGE_VALUE = 0.2, 0.2
VF_COEF = 0.1  # the value loss shares the transformer with the policy and must not drown it

# -- models ----------------------------------------------------------------------------------------

tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL, padding_side="left")
# eval() for good: with dropout, the policy that is trained would not be the one that has sampled.
policy = AutoModelForCausalLM.from_pretrained(starter.LANGUAGE_MODEL, dtype=torch.float32).eval()
reference = copy.deepcopy(policy).requires_grad_(False)  # what a good film review looks like
value_head = nn.Linear(policy.config.n_embd, 1)
for weight in value_head.parameters():
    nn.init.zeros_(weight)  # at first it expects nothing, and advantages are rewards
optimizer = torch.optim.Adam(
    [*policy.parameters(), *value_head.parameters()], lr=args.learning_rate, eps=1e-5
)

judge_tokenizer = AutoTokenizer.from_pretrained(starter.CLASSIFIER)
judge = AutoModelForSequenceClassification.from_pretrained(starter.CLASSIFIER).eval()
POSITIVE = judge.config.label2id["POSITIVE"]


# -- what the models are asked ---------------------------------------------------------------------


def encode(prompts):
    """Queries [B, Q] and their mask. <|endoftext|> comes first: so reviews began in training."""
    texts = [tokenizer.bos_token + prompt for prompt in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return batch.input_ids, batch.attention_mask.bool()


@torch.no_grad()
def sample(queries, query_mask):
    """Draw a response [B, R] to each query, token by token; the mask ends with the first EOS."""
    tokens, attention_mask, cache, responses = queries, query_mask, None, []
    for _ in range(args.new_tokens):
        # The cache holds keys and values of all earlier tokens: only the new one is computed.
        positions = position_ids_from_mask(attention_mask)[:, -tokens.shape[1] :]
        output = policy(
            tokens,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens = torch.multinomial(output.logits[:, -1].softmax(-1), 1)  # [B, 1]
        responses.append(tokens)
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens, dtype=torch.bool)], 1)
    responses = torch.cat(responses, 1)
    # A row goes on after its EOS, where nothing counts any more. The EOS itself does: to end is a
    # choice of the policy.
    return responses, mask_after(responses, tokenizer.eos_token_id)


def evaluate(model, queries, query_mask, responses):
    """log π(token) and the value before each response token, both [B, R]."""
    input_ids = torch.cat([queries, responses], 1)  # [B, T]
    attention_mask = torch.cat([query_mask, torch.ones_like(responses, dtype=torch.bool)], 1)
    hidden = model.transformer(
        input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids_from_mask(attention_mask),
    ).last_hidden_state
    # The token at position t is predicted at t − 1: from the last query token to the last but one.
    hidden = hidden[:, queries.shape[1] - 1 : -1]  # [B, R, n_embd]
    logprobs = logprobs_from_logits(model.lm_head(hidden), responses)  # [B, R, V] → [B, R]
    return logprobs, value_head(hidden).squeeze(-1)


@torch.no_grad()
def score(queries, query_mask, responses, mask):
    """The texts, the score of each [B] (the logit of POSITIVE), and P(POSITIVE) [B]."""
    rows = zip(queries, query_mask, responses, mask, strict=True)
    texts = tokenizer.batch_decode(
        [torch.cat([query[m], response[n]]) for query, m, response, n in rows],
        skip_special_tokens=True,
    )
    # The classifier has a vocabulary of its own: it is given texts, never our tokens.
    logits = judge(**judge_tokenizer(texts, return_tensors="pt", padding=True)).logits  # [B, 2]
    return texts, logits[:, POSITIVE], logits.softmax(-1)[:, POSITIVE]


def measure(title):
    """Print some samples for prompts that are never trained on; return the mean P(POSITIVE)."""
    query = encode(starter.prompts("held-out")[: args.held_out])
    texts, _, positive = score(*query, *sample(*query))
    print(f"\n{title}: P(POSITIVE) {positive.mean():.3f} on {len(texts)} held-out prompts")
    for text, p in list(zip(texts, positive, strict=True))[:6]:
        print(f"    {p:.2f}  {' '.join(text.split())}")
    return positive.mean().item()


# -- PPO -------------------------------------------------------------------------------------------

# β, the price of a nat of KL, follows the KL that is measured: up if π strays too far, else down.
kl_control = AdaptiveKLController(init_kl_coef=0.05, target=args.kl_target, horizon=500)
prompts = starter.prompts("train")
before = measure("before")
print()
started = time.perf_counter()
for step in range(args.steps):
    # 1  Sample.
    chosen = torch.randint(len(prompts), (args.batch_size,)).tolist()
    queries, query_mask = encode([prompts[i] for i in chosen])  # [B, Q]
    responses, mask = sample(queries, query_mask)  # [B, R]

    # 2  Evaluate. π's own log-probs are computed again, in the way that the updates compute them,
    #    so that the first ratio is exactly 1.
    _, scores, positive = score(queries, query_mask, responses, mask)  # [B]
    with torch.no_grad():
        old_logprobs, old_values = evaluate(policy, queries, query_mask, responses)
        ref_logprobs, _ = evaluate(reference, queries, query_mask, responses)

    # 3  Judge. The score comes once, at the last token; the KL has its price at every token, or π
    #    would end at the one text that fools the classifier best:
    #        r_t = −β·(log π_t − log π_ref,t) + 1[t is the last]·score
    rewards, _ = token_rewards(old_logprobs, ref_logprobs, scores, mask, kl_coef=kl_control.value)
    #    What is known a token later, against what was expected, summed up from the end:
    #        δ_t = r_t + γ·V_{t+1} − V_t        Â_t = δ_t + γλ·Â_{t+1}        return_t = Â_t + V_t
    advantages, returns = gae(rewards, old_values, mask, gamma=GAMMA, gae_lambda=LAMBDA)
    #    Mean 0 and variance 1 over the batch, so that the step's size is not that of the scores.
    advantages = masked_whiten(advantages, mask)

    # 4  Optimise. The samples serve several updates, and after the first one π is not the policy
    #    any more that drew them. The ratio ρ = π/π_old makes up for that; the clip ends what there
    #    is to gain from a token once it is 20 % more, or less, likely than it was:
    #        L_π = max(−Â·ρ, −Â·clip(ρ, 1 − ε, 1 + ε))
    #        L_V = ½·max((V − return)², (clip(V, V_old − ε, V_old + ε) − return)²)
    figures = []  # of each update: ratio, approxkl, clipfrac, value loss
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(args.batch_size).split(args.minibatch_size):
            m = mask[rows]
            logprobs, values = evaluate(policy, queries[rows], query_mask[rows], responses[rows])
            policy_loss, ratio, clipped = clipped_policy_loss(
                logprobs, old_logprobs[rows], advantages[rows], cliprange=CLIPRANGE
            )
            value_loss, _ = clipped_value_loss(
                values, old_values[rows], returns[rows], cliprange_value=CLIPRANGE_VALUE
            )
            loss = token_mean(policy_loss, m) + VF_COEF * token_mean(value_loss, m)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                approxkl = (logprobs - old_logprobs[rows]).square() / 2
                columns = (ratio, approxkl, clipped.float(), value_loss)
                figures.append(torch.stack([masked_mean(column, m) for column in columns]))

    # The KL of a response is the sum over its tokens.
    kl = torch.where(mask, old_logprobs - ref_logprobs, 0.0).sum(1).mean().item()
    if step == 0:  # nothing was learnt yet: a difference would be a mistake in the code above
        assert abs(kl) < 1e-4, kl
        assert abs(figures[0][0] - 1) < 1e-5, figures[0]
    _, approxkl, clipfrac, value_loss = torch.stack(figures).mean(0)
    print(
        f"step {step + 1}/{args.steps} · {time.perf_counter() - started:.0f} s · "
        f"score {scores.mean():+.2f} · P(POSITIVE) {positive.mean():.2f} · KL {kl:.2f} · "
        f"β {kl_control.value:.4f} · first ratio {figures[0][0]:.4f} · approxkl {approxkl:.4f} · "
        f"clipped {clipfrac:.1%} · value loss {value_loss:.2f}"
    )
    kl_control.update(kl, args.batch_size)

after = measure("after")
print(f"\nP(POSITIVE) {before:.3f} → {after:.3f}, at a KL of {kl:.1f} nats per response")
