"""Fine-tuning transformers models: the fused loss in their forward, in a Trainer, or in any loop."""
