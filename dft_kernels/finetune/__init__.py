"""Fine-tuning transformers models: real models and texts that come by pip alone, and the step that trains them."""
