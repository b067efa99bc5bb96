/*
 * Where a rank computes: on its host's cores, or on one of its host's GPUs; and the groups of ranks
 * that its tensors travel in, which MPI serves on the CPU and NCCL on GPUs.
 *
 * The one place that chooses between the two back ends. It is a library of its own, because who
 * links it also says which CUDA back end answers: the real one, its emulation, or none.
 */
#ifndef INTERNVLD_MODEL_DEVICE_H
#define INTERNVLD_MODEL_DEVICE_H

#include "daemon/model/model_comm.h"
#include "kernels/backend.h"
#include "kernels/cpu_cores.h"
#include "parallel/topology.h"

enum device_kind { DEVICE_CPU, DEVICE_CUDA };

struct device_options {
    enum device_kind kind;
    enum dtype dtype;       // of the model's products, F32 or BF16: activations on CUDA have it
    int n_threads;          // at least 1; CUDA: that read weights, copy and draw
    const char *isa;        // CPU: as backend_cpu_open() has it
    struct cpu_cores cores; // CPU: with whom the threads share theirs; zeroed: with nobody
    int index;              // CUDA: number among this host's devices
    int deterministic;      // CUDA: sums by lanes and tree, bitwise the same in every layout
    int enforce_eager;      // CUDA: no step is recorded and replayed
    enum weight_format x_format; // what products are to round their input to, or WEIGHT_FLOAT
    int one_shot;                // CUDA: short sums over CUDA IPC where that is possible
};

/* What the activations of a back end of `kind` are when products are of `dtype`. */
enum dtype device_activation_dtype(enum device_kind kind, enum dtype dtype);
/* A back end without groups, closed by backend_close(). */
struct backend *device_open_backend(const struct device_options *o);

/* GPUs of this host that this build can use; 0 without a driver, or in a build without CUDA. */
int device_count(void);
/* name [n_bytes] <- the kind of the first of them, "" where there is none. */
void device_name(char *name, size_t n_bytes);

/* address [n_bytes] <- where GPU `index` is on the PCI bus, for parallel/placement.h. */
void device_pci_address(int index, char *address, size_t n_bytes);

/* Where one rank computes and with whom. The gateway and ranks of a layout that shares no tensors
 * have no groups; the gateway has no back end either. */
struct device {
    struct backend *backend; // NULL: the gateway
    struct model_comm comm;
};

/* Collective over the job: every rank calls it once, right after launch_init() and before control
 * opens, in the same order. max_bytes bounds an all_reduce: max_num_batched_tokens * hidden_size *
 * 4. Dies when the device cannot be had, or cannot do what is wanted of it. */
void device_open(struct device *d, const struct device_options *o, const struct topology *t,
                 size_t max_bytes);
/* What was allocated on the back end is freed before. */
void device_close(struct device *d);

#endif
