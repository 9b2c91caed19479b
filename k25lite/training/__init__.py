"""Training stages: captions (`vit`, `joint.vit_stage`), joint text-vision training (`joint`), and what they are made of."""
