"""The thoughts of reasoning models: in which style a model marks them, and where they end in the
text of an answer.

White space around thoughts is dropped: before and after them, and before the content that follows.
A text without thoughts is returned unchanged, and one that breaks off inside of them is all
thoughts.
"""
