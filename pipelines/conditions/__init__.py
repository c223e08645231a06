"""What a model is conditioned on: one class a kind, which says all about it to every stage.

Read `config` (a recipe's `condition`), `kind` (what the stages ask of a kind), `kinds` (which there are), then one of
them: `none`, `text`, `class_labels`.
"""
