"""Parts of a MoE layer with a fault each, such as a user's own might have: ranks differ from one device."""
