class GraphModule(torch.nn.Module):
    def forward(self, L_ids_: "i64[2, 9]", L_self_modules_embed_parameters_weight_: "f32[32, 16]", L_patches_: "f32[8, 16]", L_live_: "i64[2, 9]", L_self_modules_layers_modules_0_modules_qkv_parameters_weight_: "f32[48, 16]", L_self_modules_layers_modules_0_modules_qkv_parameters_bias_: "f32[48]", L_self_modules_layers_modules_1_modules_qkv_parameters_weight_: "f32[48, 16]", L_self_modules_layers_modules_1_modules_qkv_parameters_bias_: "f32[48]", L_self_modules_layers_modules_2_modules_qkv_parameters_weight_: "f32[48, 16]", L_self_modules_layers_modules_2_modules_qkv_parameters_bias_: "f32[48]"):
        l_ids_ = L_ids_
        l_self_modules_embed_parameters_weight_ = L_self_modules_embed_parameters_weight_
        l_patches_ = L_patches_
        l_live_ = L_live_
        l_self_modules_layers_modules_0_modules_qkv_parameters_weight_ = L_self_modules_layers_modules_0_modules_qkv_parameters_weight_
        l_self_modules_layers_modules_0_modules_qkv_parameters_bias_ = L_self_modules_layers_modules_0_modules_qkv_parameters_bias_
        l_self_modules_layers_modules_1_modules_qkv_parameters_weight_ = L_self_modules_layers_modules_1_modules_qkv_parameters_weight_
        l_self_modules_layers_modules_1_modules_qkv_parameters_bias_ = L_self_modules_layers_modules_1_modules_qkv_parameters_bias_
        l_self_modules_layers_modules_2_modules_qkv_parameters_weight_ = L_self_modules_layers_modules_2_modules_qkv_parameters_weight_
        l_self_modules_layers_modules_2_modules_qkv_parameters_bias_ = L_self_modules_layers_modules_2_modules_qkv_parameters_bias_
        image: "b8[2, 9]" = l_ids_ == 7
        begin_prompt_default: "i64[2, 9]" = torch.ops.mmi.begin_prompt.default(l_ids_);  l_ids_ = None
        embedding: "f32[2, 9, 16]" = torch.nn.functional.embedding(begin_prompt_default, l_self_modules_embed_parameters_weight_, None, None, 2.0, False, False);  l_self_modules_embed_parameters_weight_ = None
        unsqueeze: "b8[2, 9, 1]" = image.unsqueeze(-1)
        x: "f32[1, 1, 8, 16]" = l_patches_[(None, None)]
        scaled_dot_product_attention: "f32[1, 1, 8, 16]" = torch._C._nn.scaled_dot_product_attention(x, x, x, attn_mask = None, dropout_p = 0.0, is_causal = False, scale = None, enable_gqa = False);  x = None
        getitem_1: "f32[8, 16]" = scaled_dot_product_attention[(0, 0)];  scaled_dot_product_attention = None
        add: "f32[8, 16]" = l_patches_ + getitem_1;  l_patches_ = getitem_1 = None
        x_1: "f32[2, 9, 16]" = embedding.masked_scatter(unsqueeze, add);  embedding = unsqueeze = add = None
        position: "i64[9]" = torch.arange(9, device = device(type='cpu'))
        getitem_2: "i64[1, 9]" = position[(None, slice(None, None, None))]
        getitem_3: "i64[9, 1]" = position[(slice(None, None, None), None)];  position = None
        le: "b8[9, 9]" = getitem_2 <= getitem_3;  getitem_2 = getitem_3 = None
        bool_1: "b8[2, 9]" = l_live_.bool()
        getitem_4: "b8[2, 1, 1, 9]" = bool_1[(slice(None, None, None), None, None, slice(None, None, None))];  bool_1 = None
        mask: "b8[2, 1, 9, 9]" = le & getitem_4;  le = getitem_4 = None
        linear: "f32[2, 9, 48]" = torch._C._nn.linear(x_1, l_self_modules_layers_modules_0_modules_qkv_parameters_weight_, l_self_modules_layers_modules_0_modules_qkv_parameters_bias_);  l_self_modules_layers_modules_0_modules_qkv_parameters_weight_ = l_self_modules_layers_modules_0_modules_qkv_parameters_bias_ = None
        view: "f32[2, 9, 3, 2, 8]" = linear.view(2, 9, 3, 2, 8);  linear = None
        permute: "f32[3, 2, 2, 9, 8]" = view.permute(2, 0, 3, 1, 4);  view = None
        q: "f32[2, 2, 9, 8]" = permute[0]
        k: "f32[2, 2, 9, 8]" = permute[1]
        v: "f32[2, 2, 9, 8]" = permute[2];  permute = None
        key_bounds_default: "i32[2, 3]" = torch.ops.mmi.key_bounds.default(l_live_)
        modality_default: "i8[2, 9]" = torch.ops.mmi.modality.default(q, [image], 'image@7', begin_prompt_default, 2, 9, 'KEY');  image = begin_prompt_default = None
        attention_default: "f32[2, 2, 9, 8]" = torch.ops.mmi.attention.default(q, k, v, l_live_, key_bounds_default, modality_default, [], 0.3535533905932738, 0, 0, 'exact', 0.95, 0.5, -1, True, '', 0, 'bshd', 'KEY/1', 2);  q = k = v = None
        transpose: "f32[2, 9, 2, 8]" = attention_default.transpose(1, 2);  attention_default = None
        flatten: "f32[2, 9, 16]" = transpose.flatten(2);  transpose = None
        x_2: "f32[2, 9, 16]" = x_1 + flatten;  x_1 = flatten = None
        linear_1: "f32[2, 9, 48]" = torch._C._nn.linear(x_2, l_self_modules_layers_modules_1_modules_qkv_parameters_weight_, l_self_modules_layers_modules_1_modules_qkv_parameters_bias_);  l_self_modules_layers_modules_1_modules_qkv_parameters_weight_ = l_self_modules_layers_modules_1_modules_qkv_parameters_bias_ = None
        view_1: "f32[2, 9, 3, 2, 8]" = linear_1.view(2, 9, 3, 2, 8);  linear_1 = None
        permute_1: "f32[3, 2, 2, 9, 8]" = view_1.permute(2, 0, 3, 1, 4);  view_1 = None
        q_1: "f32[2, 2, 9, 8]" = permute_1[0]
        k_1: "f32[2, 2, 9, 8]" = permute_1[1]
        v_1: "f32[2, 2, 9, 8]" = permute_1[2];  permute_1 = None
        attention_default_1: "f32[2, 2, 9, 8]" = torch.ops.mmi.attention.default(q_1, k_1, v_1, l_live_, key_bounds_default, modality_default, [], 0.3535533905932738, 0, 0, 'exact', 0.95, 0.5, -1, True, '', 1, 'bshd', 'KEY/2', 2);  q_1 = k_1 = v_1 = l_live_ = key_bounds_default = modality_default = None
        transpose_1: "f32[2, 9, 2, 8]" = attention_default_1.transpose(1, 2);  attention_default_1 = None
        flatten_1: "f32[2, 9, 16]" = transpose_1.flatten(2);  transpose_1 = None
        x_3: "f32[2, 9, 16]" = x_2 + flatten_1;  x_2 = flatten_1 = None
        linear_2: "f32[2, 9, 48]" = torch._C._nn.linear(x_3, l_self_modules_layers_modules_2_modules_qkv_parameters_weight_, l_self_modules_layers_modules_2_modules_qkv_parameters_bias_);  l_self_modules_layers_modules_2_modules_qkv_parameters_weight_ = l_self_modules_layers_modules_2_modules_qkv_parameters_bias_ = None
        view_2: "f32[2, 9, 3, 2, 8]" = linear_2.view(2, 9, 3, 2, 8);  linear_2 = None
        permute_2: "f32[3, 2, 2, 9, 8]" = view_2.permute(2, 0, 3, 1, 4);  view_2 = None
        q_2: "f32[2, 2, 9, 8]" = permute_2[0]
        k_2: "f32[2, 2, 9, 8]" = permute_2[1]
        v_2: "f32[2, 2, 9, 8]" = permute_2[2];  permute_2 = None
        getitem_14: "f32[2, 1, 9, 1]" = x_3[(slice(None, None, None), None, slice(None, None, None), slice(None, 1, None))]
        gt: "b8[2, 1, 9, 1]" = getitem_14 > -1000000000.0;  getitem_14 = None
        mask_1: "b8[2, 1, 9, 9]" = mask & gt;  mask = gt = None
        scaled_dot_product_attention_3: "f32[2, 2, 9, 8]" = torch._C._nn.scaled_dot_product_attention(q_2, k_2, v_2, attn_mask = mask_1, dropout_p = 0.0, is_causal = False, scale = None, enable_gqa = False);  q_2 = k_2 = v_2 = mask_1 = None
        transpose_2: "f32[2, 9, 2, 8]" = scaled_dot_product_attention_3.transpose(1, 2);  scaled_dot_product_attention_3 = None
        flatten_2: "f32[2, 9, 16]" = transpose_2.flatten(2);  transpose_2 = None
        x_4: "f32[2, 9, 16]" = x_3 + flatten_2;  x_3 = flatten_2 = None
        return (x_4,)
