"""Tiny configurations of Hugging Face's families, without dropout."""

V = 61  # words

BERT = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=1,
)
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=32,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=None,
)
BART = dict(
    vocab_size=V,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=32,
    dropout=0.0,
    attention_dropout=0.0,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=3,
    decoder_start_token_id=3,
    forced_eos_token_id=None,
)
T5 = dict(
    vocab_size=V,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=8,
    dropout_rate=0.0,
    pad_token_id=1,
    eos_token_id=3,
    decoder_start_token_id=1,
)
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16
)
DISTILBERT = dict(
    vocab_size=V,
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    max_position_embeddings=32,
    dropout=0.0,
    attention_dropout=0.0,
    seq_classif_dropout=0.0,
    pad_token_id=1,
)
MODERNBERT = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    local_attention=4,
    global_attn_every_n_layers=3,
    pad_token_id=1,
    bos_token_id=2,
    cls_token_id=2,
    eos_token_id=3,
    sep_token_id=3,
)
GPT2 = dict(
    vocab_size=V,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=32,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=None,
)
