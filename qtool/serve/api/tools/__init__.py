"""Tools of the OpenAI chat API: what a request may call, the schema that forces a call, and parsers
that find the calls in the text of an answer.

A parser takes the text in pieces of any size and returns content and calls as soon as they are
certain; its work is linear in the text. Where other engines differ:

- Arguments are the model's own JSON text and are streamed as they come; nothing is re-encoded. If
  the arguments turn out to be broken, or the length limit cuts them off, after some of them were
  sent, the call stands with what there is, as OpenAI warns its clients.
- A call of which nothing was sent (no name, no arguments, or cut off before them) is content,
  marker included, exactly as the model wrote it.
- A call after a marker counts whatever the function's name: clients know how to answer a call of a
  tool they do not have. JSON without a marker (Llama) is a call only if the tool exists, because a
  model may be asked to answer in JSON.
- White space between content and calls is dropped: before the first call, between calls, and after
  the last. Text without calls is returned unchanged.
"""
