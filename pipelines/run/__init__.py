"""A pipeline run: `recipe` (what is asked), `plan` (what is finished), `walk` (doing the rest), `report`."""
