import torch
from vllm_kvcompress.triton_kernels.window_scores import window_scores
from vllm_kvcompress.ops.pages import PagedKeys, Elements

def w(dt, ct, D, softcap=0., past=(), weights=None, paged=True):
    q = torch.randn(32, 32, D).to(dt)
    if not paged:
        return lambda: window_scores(q, torch.zeros(8, 1000, D, dtype=ct), scale=.1, softcap=softcap)
    cache = torch.zeros(70, 8, 16, 2*D, dtype=ct)
    off = torch.arange(16)[:,None]*2*D + torch.arange(D)
    k = PagedKeys(cache, Elements(off), torch.arange(63).expand(8, -1), 1000)
    return lambda: window_scores(q, k, scale=.1, softcap=softcap, past_only=past, weights=weights)
CALLS = {
 "w-bf16-128": w(torch.bfloat16, torch.bfloat16, 128),
 "w-bf16-dense": w(torch.bfloat16, torch.bfloat16, 128, paged=False),
 "w-bf16-96-past": w(torch.bfloat16, torch.bfloat16, 96, 5., (True, False, True, True), torch.ones(32)),
 "w-f16-256": w(torch.float16, torch.float16, 256),
 "w-f32-128": w(torch.float32, torch.float32, 128),
 "w-f32-256": w(torch.float32, torch.float32, 256),
 "w-fp8": w(torch.bfloat16, torch.float8_e4m3fn, 128),
}
