"""An OpenAI-compatible server over a routed pair.

`start` puts it together from the command's arguments. A request passes `asgi` (key, draining), is read by `api`,
written by `choices` and `detokenize`, and answered by `answers`; `server` joins them, `budget` steers the threshold,
`metrics` counts.
"""
