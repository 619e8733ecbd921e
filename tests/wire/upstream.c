/*
 * The present interface of upstream's libvfio-user (June 2026) in front of a library that has the earlier one.
 *
 * vfu_setup_device_dma() has max_regions in front of its callbacks since March 2026, vfu_sgl_read() and
 * vfu_sgl_write() have flags behind their buffers since April. Everything else is the library's behind this one.
 * Whoever calls the earlier form by these names ends here, as an assertion of upstream's would have it end.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct vfu_ctx vfu_ctx_t;
typedef struct dma_sg dma_sg_t;
typedef void callback(vfu_ctx_t *, void *);

static void *behind(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);

    if (found == NULL) {
        fprintf(stderr, "no %s behind this one\n", name);
        abort();
    }
    return found;
}

int vfu_setup_device_dma(vfu_ctx_t *ctx, size_t max_regions, callback *reg, callback *unreg)
{
    int (*setup)(vfu_ctx_t *, callback *, callback *) = behind("vfu_setup_device_dma");

    if (max_regions == 0 || reg == NULL || unreg == NULL || reg == unreg) {
        fprintf(stderr, "assertion: max_regions %zu, register %p, unregister %p\n", max_regions, (void *)reg,
                (void *)unreg);
        abort();
    }
    return setup(ctx, reg, unreg);
}

#define VFU_SGL_DIRECT_ACCESS 1

int vfu_sgl_read(vfu_ctx_t *ctx, dma_sg_t *sg, size_t count, void *data, int flags)
{
    int (*transfer)(vfu_ctx_t *, dma_sg_t *, size_t, void *) = behind("vfu_sgl_read");

    if ((flags & ~VFU_SGL_DIRECT_ACCESS) != 0)
        abort();
    return transfer(ctx, sg, count, data);
}

int vfu_sgl_write(vfu_ctx_t *ctx, dma_sg_t *sg, size_t count, void *data, int flags)
{
    int (*transfer)(vfu_ctx_t *, dma_sg_t *, size_t, void *) = behind("vfu_sgl_write");

    if ((flags & ~VFU_SGL_DIRECT_ACCESS) != 0)
        abort();
    return transfer(ctx, sg, count, data);
}
