/* Lets Debian 12's User-mode Linux (6.1) run on processors with a large register state (AMX): preload it with LD_PRELOAD.
 *
 * Such a kernel writes its processes' registers by PTRACE_SETREGSET from a buffer for at most AVX-512. The host refuses a
 * buffer that is shorter than all it has (Linux, arch/x86/kernel/fpu/regset.c, xstateregs_set), and UML ends with
 * "Kernel panic: Attempted to kill init". Here the rest is filled in with what the process has. Elsewhere it changes nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
    static long (*real)(enum __ptrace_request, ...);
    static char whole[1 << 16] __attribute__((aligned(64)));
    va_list arguments;

    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!real)
        real = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && (unsigned long)address == NT_X86_XSTATE) {
        struct iovec *given = data;
        struct iovec all = {whole, sizeof whole};
        if (real(PTRACE_GETREGSET, pid, address, &all) == 0 && given->iov_len < all.iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return real(request, pid, address, &all);
        }
    }
    return real(request, pid, address, data);
}
