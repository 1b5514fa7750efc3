"""Models and tokenizers, however the user names them.

Input: an id on the Hub, a path, or a model. Output: the model, its tokenizer, the text of its tokens, a description of
it, and its logits at chosen positions. Must not depend on the contrast, on kept steps, or on the project's own files.
"""
