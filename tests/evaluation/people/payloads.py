# ruff: noqa: E501
"""Texts that would run something if they were taken for HTML: each calls hit() if it runs."""

CALL = "window.hit&&hit()"

PAYLOADS = [
    *(f"<script>{CALL}</script>", f"<SCRIPT SRC=data:text/javascript,{CALL}></SCRIPT>"),
    *(f"<img src=x onerror={CALL}>", f"<img src=x onerror='{CALL}'//", f'"><img src=x onerror="{CALL}">'),
    *(f"<svg onload={CALL}>", f"<svg/onload={CALL}>", f"<svg><script>{CALL}</script></svg>"),
    *(f"<svg><animate onbegin={CALL} attributeName=x dur=1s>", f"<body onload={CALL}>"),
    *(f"<iframe src=javascript:{CALL}>", f'<iframe srcdoc="<script>parent.{CALL}</script>"></iframe>'),
    *(f"<a href=javascript:{CALL}>x</a>", f"<a href='java\tscript:{CALL}'>x</a>"),
    *(f"<input autofocus onfocus={CALL}>", f"<select autofocus onfocus={CALL}>"),
    *(f"<textarea autofocus onfocus={CALL}>", f"<keygen autofocus onfocus={CALL}>"),
    *(f"<video><source onerror={CALL}></video>", f"<audio src=x onerror={CALL}>"),
    *(f"<details open ontoggle={CALL}>", f"<marquee onstart={CALL}>x</marquee>"),
    *(f"<object data=javascript:{CALL}>", f"<embed src=javascript:{CALL}>"),
    *(f"<form action=javascript:{CALL}><button>x</button></form>", f"<isindex action=javascript:{CALL}>"),
    *(f"<math href=javascript:{CALL}>x</math>", f"<base href=javascript:{CALL}//>"),
    *(f"<meta http-equiv=refresh content='0;url=javascript:{CALL}'>", f"<link rel=import href=data:,{CALL}>"),
    *(f"<style>@import'javascript:{CALL}';</style>", f"<div style='background:url(javascript:{CALL})'>x</div>"),
    *(f"<template><script>{CALL}</script></template>", f"<noscript><p title='</noscript><img src=x onerror={CALL}>'>"),
    *(f"<math><mtext><table><mglyph><style><!--</style><img title='--><img src=1 onerror={CALL}>'>",),
    *(f"<xss id=x tabindex=1 onfocus={CALL}></xss>", f"<button popovertarget=x onclick={CALL}>x</button>"),
    *(f"[x](javascript:{CALL})", f"[x](JaVaScRiPt:{CALL})", f"![x](x\"onerror=\"{CALL})"),
    *(f"<javascript:{CALL}>", f"[x]: javascript:{CALL}\n[x]", f"[x](data:text/html,<script>{CALL}</script>)"),
    *(f"```\n</code></pre><script>{CALL}</script>\n```", f"`</code><script>{CALL}</script>`"),
    *(f"</textarea><script>{CALL}</script>", f"</title><script>{CALL}</script>"),
    *(f"-->\n<script>{CALL}</script>\n<!--", f"]]><script>{CALL}</script>"),
    *(f"{{{{constructor.constructor('{CALL}')()}}}}", f"${{{CALL}}}", f"';{CALL};//", f'";{CALL};//'),
    *(f"\\u003cscript\\u003e{CALL}\\u003c/script\\u003e", f"&lt;script&gt;{CALL}&lt;/script&gt;"),
    *(f"<scr\0ipt>{CALL}</scr\0ipt>", f"<img src=x:x onerror&equals;{CALL}>", f"＜script＞{CALL}＜/script＞"),
]  # fmt: skip
"""Of every kind: tags, events, URLs, styles, other namespaces, Markdown, templates, escapes."""
