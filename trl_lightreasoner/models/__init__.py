"""Models and tokenizers, whichever way the user names them.

In: an id on the Hub, a path, or a model. Out: the model, its tokenizer, the text of its tokens, what it says of
itself, and its logits at chosen positions. Knows nothing of an expert's contrast, of steps, or of files of the
project's own.
"""
