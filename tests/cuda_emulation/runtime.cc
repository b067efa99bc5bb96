/*
 * CUDA's run time calls over host memory: device memory, streams, graphs, events, launches.
 *
 * What makes it a test rather than a stand-in:
 *   - Device memory is one reserved range that the host can touch only while a stream's queue runs:
 *     a host pointer and a device pointer mixed up is a crash that says so.
 *   - Work on a stream is queued and runs at the next synchronisation or communication, not at the
 *     call: a missing synchronisation reads old bytes. Pageable host memory is read at the call (as
 * the real call stages it), pinned memory when the copy runs.
 *   - Fresh device memory is filled with 0xff (NaN), its first MiB at least.
 *   - A launch is checked against the limits of sm_80: threads, grid, shared memory.
 *   - A captured stream records; what a capture must not do (allocate, synchronise) fails.
 *
 * Other processes can open that memory (CUDA IPC): it is a file without a name, reached through
 * /proc, and so gone with its last process. A launch that is given such memory runs at once,
 * because kernels elsewhere may wait for it and a device would get there without the host.
 * INTERNVLD_EMULATION_IPC: stale, no-peer or pcie, as said at the calls.
 */
#include <fcntl.h>
#include <map>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "execution.h"

#if EMULATION_ASAN
extern "C" {
void __asan_poison_memory_region(void const volatile *p, size_t n_bytes);
void __asan_unpoison_memory_region(void const volatile *p, size_t n_bytes);
}
#define ASAN(x) x
#else
#define ASAN(x)
#endif

struct emulated_stream {
    std::vector<std::function<void()>> queue;
    struct emulated_graph *capture; // being recorded, or NULL
};

struct emulated_graph {
    std::vector<std::function<void()>> nodes;
};

struct emulated_event {
    int pending;
    struct emulated_stream *stream; // of the last record
};

static const size_t DEVICE_BYTES = (size_t)16 << 30, GAP_BYTES = 256;
static const size_t FILL_BYTES = 1 << 20; // more would cost every process its pages
static const size_t STATIC_SHARED_LIMIT = 48 << 10, SHARED_LIMIT = 163 << 10; // sm_80

static char *device_base;
static int device_file, current_device;
static size_t device_top;                               // end of the last live block
static std::map<char *, size_t> blocks, pinned, opened; // opened: of other processes, whole pages
static std::map<const void *, size_t> shared_limits;    // cudaFuncSetAttribute
static std::vector<emulated_stream *> streams;
static int open_depth;
static cudaError_t last_error;
static struct sigaction old_action;

/* ---- the door to device memory ---- */

static int lies_in(const std::map<char *, size_t> &pieces, const void *p)
{
    auto it = pieces.upper_bound((char *)p);

    return it != pieces.begin() && (--it, (char *)p < it->first + it->second);
}

static int is_device(const void *p)
{
    return (device_base && (char *)p >= device_base && (char *)p < device_base + DEVICE_BYTES) ||
           lies_in(opened, p);
}

static void on_segv(int sig, siginfo_t *info, void *context)
{
    static const char message[] =
        "cuda emulation: the host touched device memory (a pointer of op_alloc() was dereferenced "
        "outside a kernel or a copy)\n";
    char *p = (char *)info->si_addr;

    (void)sig;
    (void)context;
    if (is_device(p)) {
        (void)!write(2, message, sizeof(message) - 1);
        _exit(3);
    }
    sigaction(SIGSEGV, &old_action, nullptr); // the fault repeats under the former handler
}

static void device_reserve(void)
{
    struct sigaction action = {};

    if (device_base)
        return;
    device_file = memfd_create("cuda emulation", MFD_CLOEXEC);
    if (device_file < 0 || ftruncate(device_file, (off_t)DEVICE_BYTES) != 0)
        emulated_die("no file for the device's memory");
    device_base =
        (char *)mmap(nullptr, DEVICE_BYTES, PROT_NONE, MAP_SHARED | MAP_NORESERVE, device_file, 0);
    if (device_base == MAP_FAILED)
        emulated_die("cannot reserve the device's memory");
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &old_action);
}

static void device_protect(int protection)
{
    if (device_top)
        mprotect(device_base, device_top, protection);
    for (auto &o : opened)
        mprotect(o.first, o.second, protection);
}

static void device_open(void)
{
    if (open_depth++ == 0)
        device_protect(PROT_READ | PROT_WRITE);
}

static void device_close(void)
{
    if (--open_depth == 0)
        device_protect(PROT_NONE);
}

/* Of a block that nothing is queued for: its pages alone are opened, all would take longer. */
static void device_fill(char *block, size_t n_bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), in_page = (uintptr_t)block % page;

    mprotect(block - in_page, in_page + n_bytes, PROT_READ | PROT_WRITE);
    memset(block, 0xff, n_bytes);
    mprotect(block - in_page, in_page + n_bytes, PROT_NONE);
}

static cudaError_t fail(cudaError_t e)
{
    if (e != cudaSuccess)
        last_error = e;
    return e;
}

/* ---- how much is allocated and copied (usage.py reads it) ---- */

struct usage {
    uint64_t bytes, peak_bytes, n_allocations, n_uploads, downloaded_bytes;
};

/* With INTERNVLD_EMULATION_MEMORY=DIR the process's struct usage is the file DIR/PID. */
static struct usage *usage_open(void)
{
    static struct usage unseen;
    const char *dir = getenv("INTERNVLD_EMULATION_MEMORY");
    char path[4096];

    if (!dir)
        return &unseen;
    snprintf(path, sizeof(path), "%s/%d", dir, (int)getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(struct usage)) != 0)
        emulated_die("INTERNVLD_EMULATION_MEMORY: the file cannot be made");
    void *p = mmap(nullptr, sizeof(struct usage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        emulated_die("INTERNVLD_EMULATION_MEMORY: the file cannot be mapped");
    close(fd);
    return (struct usage *)p;
}

static struct usage *usage_of_process(void)
{
    static struct usage *u = usage_open();

    return u;
}

static void account(size_t n_bytes, int is_freed)
{
    struct usage *u = usage_of_process();

    if (is_freed) {
        u->bytes -= n_bytes;
        return;
    }
    u->bytes += n_bytes;
    u->n_allocations++;
    u->peak_bytes = u->bytes > u->peak_bytes ? u->bytes : u->peak_bytes;
}

/* ---- queues ---- */

void emulated_submit(cudaStream_t s, std::function<void()> work)
{
    if (!s)
        emulated_die("work on the default stream: name the back end's stream");
    (s->capture ? s->capture->nodes : s->queue).push_back(std::move(work));
}

static void stream_run(emulated_stream *s)
{
    if (s->queue.empty())
        return;
    std::vector<std::function<void()>> queue;
    queue.swap(s->queue);
    device_open();
    for (auto &work : queue)
        work();
    device_close();
}

void emulated_flush(cudaStream_t s)
{
    if (!s->capture)
        stream_run(s);
}

static int any_capture(void)
{
    for (emulated_stream *s : streams)
        if (s->capture)
            return 1;
    return 0;
}

/* 1 when some word of it is a pointer into memory of another process. */
static int names_opened(const void *arguments, size_t n_bytes)
{
    for (size_t i = 0; !opened.empty() && i + sizeof(void *) <= n_bytes; i += sizeof(void *)) {
        void *word;
        memcpy(&word, (const char *)arguments + i, sizeof(word));
        if (lies_in(opened, word))
            return 1;
    }
    return 0;
}

void emulated_launch_checked(const void *kernel, dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t s, const void *arguments, size_t n_bytes,
                             std::function<void()> body)
{
    auto limit = shared_limits.find(kernel);
    size_t allowed = limit == shared_limits.end() ? STATIC_SHARED_LIMIT : limit->second;
    size_t n_threads = (size_t)block.x * block.y * block.z;

    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
        !n_threads || n_threads > 1024 || block.z > 64 || shared_bytes > allowed) {
        fail(cudaErrorInvalidConfiguration);
        return;
    }
    emulated_submit(s, [=] { emulated_run(grid, block, shared_bytes, body); });
    if (names_opened(arguments, n_bytes))
        emulated_flush(s);
}

/* ---- the calls ---- */

extern "C" {

const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
        return "invalid resource handle";
    case cudaErrorNotReady:
        return "device not ready";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    }
    return "unknown error";
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t e = last_error;

    last_error = cudaSuccess;
    return e;
}

cudaError_t cudaGetDeviceCount(int *n)
{
    const char *e = getenv("INTERNVLD_EMULATION_DEVICES");

    *n = e ? atoi(e) : 8;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    int n;

    cudaGetDeviceCount(&n);
    if (device < 0 || device >= n)
        return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

/* Domains that no machine has, so that an emulated GPU is next to nothing but in a test's topology;
 * hexadecimal digits in capitals, as the real call gives them. */
cudaError_t cudaDeviceGetPCIBusId(char *address, int n_bytes, int device)
{
    int n;

    cudaGetDeviceCount(&n);
    if (device < 0 || device >= n || n_bytes < 13)
        return fail(cudaErrorInvalidValue);
    snprintf(address, (size_t)n_bytes, "FFFE:%02X:00.0", 0xa0 + device);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    const char *name = getenv("INTERNVLD_EMULATION_NAME"), *sm = getenv("INTERNVLD_EMULATION_SM");
    int number = sm ? atoi(sm) : 90;

    (void)device;
    memset(p, 0, sizeof(*p));
    snprintf(p->name, sizeof(p->name), "%s", name ? name : "emulated");
    p->totalGlobalMem = DEVICE_BYTES;
    p->major = number / 10;
    p->minor = number % 10;
    p->multiProcessorCount = 4;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t n_bytes)
{
    size_t size = (n_bytes + 255) / 256 * 256;

    device_reserve();
    if (any_capture())
        return fail(cudaErrorStreamCaptureUnsupported);
    if (n_bytes > DEVICE_BYTES || device_top + size + GAP_BYTES > DEVICE_BYTES)
        return fail(cudaErrorMemoryAllocation);
    char *block = device_base + device_top;
    device_top += size + GAP_BYTES;
    ASAN(__asan_unpoison_memory_region(block, size));
    device_fill(block, size < FILL_BYTES ? size : FILL_BYTES);
    ASAN(__asan_poison_memory_region(block + n_bytes, size + GAP_BYTES - n_bytes));
    blocks[block] = size;
    account(size, 0);
    *p = block;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (!p)
        return cudaSuccess;
    auto it = blocks.find((char *)p);
    if (it == blocks.end())
        return fail(cudaErrorInvalidValue);
    if (any_capture())
        return fail(cudaErrorStreamCaptureUnsupported);
    for (emulated_stream *s : streams)
        stream_run(s);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *first = (char *)(((uintptr_t)it->first + page - 1) / page * page);
    char *last = (char *)((uintptr_t)(it->first + it->second) / page * page);
    if (last > first)
        (void)!fallocate(device_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         first - device_base, last - first);
    ASAN(__asan_poison_memory_region(it->first, it->second));
    account(it->second, 1);
    blocks.erase(it);
    device_top = blocks.empty() ? 0
                                : (size_t)(blocks.rbegin()->first - device_base) +
                                      blocks.rbegin()->second + GAP_BYTES;
    return cudaSuccess;
}

/* ---- other devices and other processes ---- */

static int ipc_is(const char *planted)
{
    const char *e = getenv("INTERNVLD_EMULATION_IPC");

    return e && strcmp(e, planted) == 0;
}

cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *text)
{
    char own[32];
    int n;

    cudaGetDeviceCount(&n);
    for (*device = 0; *device < n; ++*device)
        if (cudaDeviceGetPCIBusId(own, sizeof(own), *device) == cudaSuccess && !strcmp(own, text))
            return cudaSuccess;
    return fail(cudaErrorInvalidDevice);
}

/* no-peer: no device reaches another. */
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    *can = device != peer && !ipc_is("no-peer");
    return cudaSuccess;
}

/* pcie: devices reach each other, without atomics. */
cudaError_t cudaDeviceGetP2PAttribute(int *value, enum cudaDeviceP2PAttr a, int device, int peer)
{
    if (a != cudaDevP2PAttrNativeAtomicSupported || device == peer)
        return fail(cudaErrorInvalidValue);
    *value = !ipc_is("pcie");
    return cudaSuccess;
}

struct ipc_content {
    pid_t pid;
    int file;
    size_t offset, n_bytes; // in the lender's device memory
};
static_assert(sizeof(ipc_content) <= sizeof(cudaIpcMemHandle_t), "it travels in the handle");

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p)
{
    auto it = blocks.find((char *)p);

    if (it == blocks.end())
        return fail(cudaErrorInvalidValue);
    ipc_content content = {getpid(), device_file, (size_t)(it->first - device_base), it->second};
    memset(handle, 0, sizeof(*handle));
    memcpy(handle, &content, sizeof(content));
    return cudaSuccess;
}

/* stale: the mapping is a copy from the first write on, and nobody else sees what it holds. */
cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned flags)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    ipc_content content;
    char path[64];

    memcpy(&content, &handle, sizeof(content));
    if (flags != cudaIpcMemLazyEnablePeerAccess || content.pid == getpid()) // as the real one
        return fail(cudaErrorInvalidValue);
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)content.pid, content.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return fail(cudaErrorInvalidResourceHandle);
    size_t in_page = content.offset % page, n_bytes = in_page + content.n_bytes;
    void *start = mmap(nullptr, n_bytes, PROT_NONE, ipc_is("stale") ? MAP_PRIVATE : MAP_SHARED,
                       file, (off_t)(content.offset - in_page));
    close(file);
    if (start == MAP_FAILED)
        return fail(cudaErrorMemoryAllocation);
    opened[(char *)start] = n_bytes;
    *p = (char *)start + in_page;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *p)
{
    auto it = opened.upper_bound((char *)p);

    if (it == opened.begin() || (--it, (char *)p >= it->first + it->second))
        return fail(cudaErrorInvalidValue);
    for (emulated_stream *s : streams)
        stream_run(s);
    munmap(it->first, it->second);
    opened.erase(it);
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMallocHost(void **p, size_t n_bytes)
{
    if (any_capture())
        return fail(cudaErrorStreamCaptureUnsupported);
    *p = malloc(n_bytes ? n_bytes : 1);
    if (!*p)
        return fail(cudaErrorMemoryAllocation);
    pinned[(char *)*p] = n_bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
    if (!p)
        return cudaSuccess;
    if (!pinned.erase((char *)p))
        return fail(cudaErrorInvalidValue);
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = DEVICE_BYTES - device_top;
    *total_bytes = DEVICE_BYTES;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t n_bytes, enum cudaMemcpyKind kind,
                            cudaStream_t s)
{
    int to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    int from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;

    if (kind == cudaMemcpyDefault)
        to_device = is_device(dst), from_device = is_device(src);
    if (n_bytes && (to_device != is_device(dst) || from_device != is_device(src)))
        return fail(cudaErrorInvalidValue);
    if (!n_bytes)
        return cudaSuccess;
    usage_of_process()->n_uploads += to_device && !from_device;
    usage_of_process()->downloaded_bytes += to_device ? 0 : n_bytes;
    if (!from_device && !lies_in(pinned, src)) {
        if (s && s->capture)
            return fail(cudaErrorStreamCaptureUnsupported);
        std::vector<char> staged((const char *)src, (const char *)src + n_bytes);
        emulated_submit(s, [=] { memcpy(dst, staged.data(), n_bytes); });
    } else {
        emulated_submit(s, [=] { memcpy(dst, src, n_bytes); });
    }
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t n_bytes, cudaStream_t s)
{
    if (n_bytes && !is_device(dst))
        return fail(cudaErrorInvalidValue);
    emulated_submit(s, [=] { memset(dst, value, n_bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags)
{
    (void)flags;
    *s = new emulated_stream();
    streams.push_back(*s);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    stream_run(s);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == s)
            streams.erase(streams.begin() + (long)i);
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    if (any_capture())
        return fail(cudaErrorStreamCaptureUnsupported);
    stream_run(s);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode)
{
    (void)mode;
    if (s->capture)
        return fail(cudaErrorInvalidValue);
    s->capture = new emulated_graph();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph)
{
    if (!s->capture)
        return fail(cudaErrorInvalidValue);
    *graph = s->capture;
    s->capture = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    (void)flags;
    *exec = new emulated_graph(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s)
{
    emulated_submit(s, [exec] {
        for (auto &node : exec->nodes)
            node();
    });
    emulated_flush(s); // it may communicate
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    for (emulated_stream *s : streams)
        stream_run(s);
    delete exec;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags)
{
    (void)flags;
    *e = new emulated_event();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    for (emulated_stream *s : streams)
        stream_run(s);
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    e->pending++;
    e->stream = s;
    emulated_submit(s, [e] { e->pending--; });
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e)
{
    return e->pending ? cudaErrorNotReady : cudaSuccess;
}

/* Runs no more than what was queued before the record: whoever waits for too little sees it. */
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    if (any_capture())
        return fail(cudaErrorStreamCaptureUnsupported);
    device_open();
    while (e->pending) {
        std::function<void()> work = std::move(e->stream->queue.front());
        e->stream->queue.erase(e->stream->queue.begin());
        work();
    }
    device_close();
    return cudaSuccess;
}

} // extern "C"

cudaError_t emulated_func_limit(const void *kernel, int value)
{
    if ((size_t)value > SHARED_LIMIT)
        return fail(cudaErrorInvalidValue);
    shared_limits[kernel] = (size_t)value;
    return cudaSuccess;
}
