"""The paper's result as a program: how stably ViT_P, ViT_C and a CNN train (section 5)."""
