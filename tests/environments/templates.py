"""Chat templates with tools, worded here after the documented forms, and tokenizers for them."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import REAL_MODELS
from tests.test_chats import CHATML, TEMPLATES
from trl import starter

LLAMA_3_TOOLS = (  # the tools are a part of the first user message; one call a turn
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% elif role == 'ipython' %}{{ m.content | tojson }}"
    "{% else %}{% if tools and role == 'user' and messages[:loop.index] | length <= 2 %}"
    "Respond with JSON for a function call. <|python_tag|> is for Python.\n\n"
    "{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{% endif %}"
    "{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_TOOLS = (  # the tools stand before the last user message; ids of nine characters
    "{{ bos_token }}{% set ns = namespace(index=0, last=0) %}"
    "{% for m in messages if m.role == 'user' %}{% set ns.last = ns.last + 1 %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.index = ns.index + 1 %}"
    "{% if loop.index0 > 0 and messages[loop.index0 - 1].role not in ('assistant', 'system') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if tools and ns.index == ns.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST]{% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    '{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{{ \', \' if not loop.last }}'
    "{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}'
    "[/TOOL_RESULTS]{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
QWEN_TOOLS = (  # thinking stays behind the last user message, and is dropped before it
    "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}# Tools <tools>{% for t in tools %}{{ t | tojson }}{% endfor %} </tools> "
    '<tool_call> {"name": <function-name>, "arguments": <args-json-object>} </tool_call>{% endif %}'
    "<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = ns.last + 1 %}{% endfor %}{% set at = namespace(user=0) %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{% set at.user = at.user + 1 %}"
    "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% if at.user == ns.last and '</think>' in m.content %}"
    "<think>\n{{ thought }}{{ '\\n' }}</think>{{ '\\n\\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{% if said or not loop.first %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% elif m.role == 'tool' %}{% set role = messages[loop.index0 - 1].role %}"
    "{% if role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n' }}<tool_response>\n{{ m.content }}{{ '\\n' }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
GLM = (  # a turn ends where the next begins; what is thought stays if it is asked for
    "{% if tools %}<|system|>{{ '\\n' }}{{ tools | tojson }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = ns.last + 1 %}{% endfor %}{% set at = namespace(user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set at.user = at.user + 1 %}"
    "<|user|>\n{{ m.content }}{% elif m.role == 'tool' %}"
    "<|observation|>\n<tool_response>\n{{ m.content }}{{ '\\n' }}</tool_response>"
    "{% elif m.role == 'system' %}<|system|>\n{{ m.content }}"
    "{% else %}<|assistant|>"
    "{% if (clear_thinking is defined and not clear_thinking) or at.user == ns.last %}"
    "{{ m.content }}{% else %}<think></think>{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>"
    "<arg_value>{{ value }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI_4 = (  # a special token stands behind a call, and does not end the turn
    "{% if tools %}<|system|>{% for t in tools %}<|tool|>{{ t.function | tojson }}<|/tool|>"
    "{% endfor %}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|tool_response|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<|tool_call|>{{ call.function | tojson }}<|/tool_call|>{% endfor %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>"]
MISTRAL_MARKS = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
MISTRAL_MARKS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
PHI_MARKS = [*TEMPLATES["phi3"][2], "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"]
PHI_MARKS += ["<|tool_response|>"]
WITH_TOOLS = TEMPLATES | {
    "llama3": (LLAMA_3_TOOLS, TEMPLATES["llama3"][1], LLAMA_MARKS),
    "mistral": (MISTRAL_TOOLS, TEMPLATES["mistral"][1], MISTRAL_MARKS),
    "qwen": (QWEN_TOOLS, CHATML | {"eos_token": "<|im_end|>"}, ["<|endoftext|>"]),
    "phi4": (PHI_4, {"eos_token": "<|endoftext|>"}, PHI_MARKS),
    "glm": (GLM, {"eos_token": "<|endoftext|>"}, ["<|user|>", "<|assistant|>", "<|observation|>"]),
}
ENDS = {
    "phi4": ["<|end|>"],
    "gemma": ["<end_of_turn>"],
    "phi3": ["<|end|>"],
    "glm": ["<|user|>", "<|observation|>"],
}
"""What ends a turn besides the EOS."""
TEXTS = ["def f(a, b):\n    return a + b  # 12", "What is 12 * 34? I think 408.\n\nNo!", '{"a": 1}']


@cache
def pieces():
    """Llama's kind: words carry their space, which a text begins with; bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]  # bytes are pieces as others
    return json.dumps(whole)


def tokenizer_of(family, kind="bytes"):
    """The tokenizer of a family: its template and special tokens, and pieces of GPT-2's kind."""
    template, named, others = WITH_TOOLS[family]
    if template is None and (REAL_MODELS / "smollm2").is_dir():
        return AutoTokenizer.from_pretrained(REAL_MODELS / "smollm2")
    if kind == "bytes":
        tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    else:
        whole = Tokenizer.from_str(pieces())
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>")
    tokenizer.add_special_tokens(named)
    tokenizer.add_tokens(others, special_tokens=True)
    if family == "qwen":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def end_ids(tokenizer, family):
    return tokenizer.convert_tokens_to_ids([*ENDS.get(family, []), tokenizer.eos_token])
