/*
 * Tokens from the best of their rows (op_draw): a block each, whose threads find the weights; what
 * is summed in order is one thread's (kernels/draw_best.h).
 */
#include "kernels/cuda_internal.h"
#include "kernels/draw_best.h"

__global__ void __launch_bounds__(TOP_K)
    draw_kernel(struct drawn *out, const struct draw_params *params, const struct top_k *best,
                int first, int n_rows, int vocab)
{
    CUDA_SHARED(struct draw_list, list, 1);
    const struct draw_params *p = params + blockIdx.x;
    int row = p->row - first, k = (int)threadIdx.x;

    if (p->row < first || row >= n_rows)
        return;
    if (p->temperature > 0 && k < best[row].n)
        list->weights[k] = draw_weight(&best[row], k, p->temperature);
    __syncthreads();
    if (k == 0)
        out[blockIdx.x] = draw_best(list, p, &best[row], vocab);
}

void cuda_draw(struct backend *b, struct drawn *out, const struct draw_params *params, int32_t n,
               const struct top_k *best, int32_t first, int32_t n_rows, int32_t vocab)
{
    LAUNCH(draw_kernel, dim3((unsigned)n), dim3(TOP_K), 0, cuda_state_of(b)->stream, out, params,
           best, first, n_rows, vocab);
}
