"""From messages to tokens: chat templates, the tokenizer and grammars."""
