"""Rollout: a language model writes a response to each query.

`Sampler` does it for any causal or encoder-decoder model of transformers. Any other engine can do
it too: training asks for a `trl.batch.Rollout` and not for where it comes from. The protocol:

* `queries` [B, Q] hold each prompt as the model saw it, special tokens included, padded on the
  left; `responses` [B, R] what it wrote, padded on the right, with the EOS that ended it. Give
  tokens, never texts to be encoded again: the same text can have other tokens.
* The masks are True on tokens that count. A response that stopped at its maximal length has no
  EOS; do not add one. `Rollout.from_lists` pads and masks.
* Tokens are drawn from the policy's own distribution at `PPOConfig.temperature`: no top-k, no
  top-p, no penalties, no forced tokens, no dropout.
* The rest may be left out. `behaviour_logprobs` [B, R] are those of the drawn tokens in that whole
  distribution, 0 outside the mask; leave them out if the engine's numbers are not close to those
  of the policy that is trained. `values` [B, R] are the value head's before each token.
  `group_ids` [B] tell which rows answer the same query; `ended` [B], which stopped by themselves.

With transformers' own `generate`, for a causal model and queries that are padded on the left:

    output = model.generate(
        queries, attention_mask=query_mask, max_new_tokens=24,
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=eos,
    )
    rollout = Rollout.from_lists(
        [row[mask] for row, mask in zip(queries, query_mask)],
        output[:, queries.shape[1]:],
        eos_token_id=eos,
    )
    rollout.check()

An encoder-decoder has each in a place of its own: `queries` hold what the encoder reads, with the
EOS that its tokenizer adds, `responses` what the decoder wrote. The tokens that the decoder begins
with are not the policy's choice and in neither: the `decoder_start_token_id`, and behind it the
`forced_bos_token_id` of the generation config, the target language of mBART and NLLB. `generate`
returns them; they may look like an EOS (BART's start does), so they are cut off first. It is also
told not to force anything at the end (`forced_eos_token_id`), or at all. For queries that are
padded on the right, since BART counts positions in columns:

    start = trl.anatomy.response_start(model)
    output = model.generate(
        queries, attention_mask=query_mask, max_new_tokens=24, forced_eos_token_id=None,
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=eos,
    )
    rollout = Rollout.from_lists(
        [row[mask] for row, mask in zip(queries, query_mask)],
        output[:, len(start):],
        eos_token_id=eos,
    )
    rollout.check()

Sampling and scoring are tested to agree for T5 and its kin (mT5, UMT5, LongT5, Switch
Transformers, T5Gemma) and for BART and its kin (mBART, M2M100 and NLLB, Marian, Pegasus, PLBart,
LED, Blenderbot). ProphetNet, which predicts several tokens at once, is refused by the trainer, as
is FSMT.
"""

from trl.rollout.sampler import Sampler

__all__ = ["Sampler"]
