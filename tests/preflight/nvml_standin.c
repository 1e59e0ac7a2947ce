/* A stand-in for the driver's libnvidia-ml.so.1: answers from the file that NVML_ANSWERS names, lines of `GPU.NAME VALUE`.
   What has no line is "not supported" (3), as a real card says of what it lacks. `error N` makes the start fail with N. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *gpu_t;
typedef unsigned long long u64;
static int answer(gpu_t gpu, const char *name, char *out, size_t size) {
    char key[96], found[96], value[512];
    if (gpu) snprintf(key, sizeof key, "%ld.%s", (long)gpu - 1, name);
    else snprintf(key, sizeof key, "%s", name);
    FILE *file = fopen(getenv("NVML_ANSWERS"), "r");
    if (!file) return 999;
    int code = 3;
    while (fscanf(file, "%95s %511[^\n]", found, value) == 2)
        if (!strcmp(found, key)) { snprintf(out, size, "%s", value); code = 0; }
    fclose(file);
    return code;
}
static int number(gpu_t gpu, const char *name, u64 *out) {
    char text[512];
    int code = answer(gpu, name, text, sizeof text);
    if (!code) *out = strtoull(text, 0, 10);
    return code;
}
static int small(gpu_t gpu, const char *name, unsigned *out) {
    u64 value;
    int code = number(gpu, name, &value);
    if (!code) *out = (unsigned)value;
    return code;
}
#define SMALL(function, name) int function(gpu_t gpu, unsigned *out) { return small(gpu, name, out); }
#define OF_KIND(function, name) int function(gpu_t gpu, unsigned kind, unsigned *out) { (void)kind; return small(gpu, name, out); }
int nvmlInitWithFlags(unsigned flags) { unsigned code = 0; (void)flags; small(0, "error", &code); return (int)code; }
int nvmlDeviceGetCount_v2(unsigned *out) { return small(0, "count", out); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, gpu_t *out) {
    unsigned lost = 0;
    *out = (gpu_t)(long)(index + 1);
    return small(*out, "lost", &lost) ? 0 : 15;
}
int nvmlDeviceGetUUID(gpu_t gpu, char *out, unsigned size) { return answer(gpu, "uuid", out, size); }
int nvmlDeviceGetName(gpu_t gpu, char *out, unsigned size) { return answer(gpu, "name", out, size); }
OF_KIND(nvmlDeviceGetTemperature, "temperature")
OF_KIND(nvmlDeviceGetTemperatureThreshold, "slowdown")
OF_KIND(nvmlDeviceGetClockInfo, "clock")
OF_KIND(nvmlDeviceGetMaxClockInfo, "clock_max")
SMALL(nvmlDeviceGetFanSpeed, "fan")
SMALL(nvmlDeviceGetPowerUsage, "power")
SMALL(nvmlDeviceGetEnforcedPowerLimit, "power_limit")
SMALL(nvmlDeviceGetPowerManagementDefaultLimit, "power_default")
SMALL(nvmlDeviceGetCurrPcieLinkGeneration, "generation")
SMALL(nvmlDeviceGetMaxPcieLinkGeneration, "generation_max")
SMALL(nvmlDeviceGetCurrPcieLinkWidth, "width")
SMALL(nvmlDeviceGetMaxPcieLinkWidth, "width_max")
SMALL(nvmlDeviceGetPcieReplayCounter, "replays")
/* Drivers before 535 have no ...EventReasons: this stand-in is one of them. */
int nvmlDeviceGetCurrentClocksThrottleReasons(gpu_t gpu, u64 *out) { return number(gpu, "reasons", out); }
int nvmlDeviceGetTotalEccErrors(gpu_t gpu, unsigned kind, unsigned counter, u64 *out) {
    (void)counter;
    return number(gpu, kind ? "ecc_uncorrected" : "ecc_corrected", out);
}
int nvmlDeviceGetRetiredPages(gpu_t gpu, unsigned cause, unsigned *count, u64 *pages) {
    unsigned there;
    int code = small(gpu, cause ? "retired_double" : "retired_single", &there);
    if (code) return code;
    if (pages) memset(pages, 0, there * sizeof *pages);
    *count = there;
    return pages || !there ? 0 : 7;
}
int nvmlDeviceGetRemappedRows(gpu_t gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    *corrected = *uncorrected = *pending = 0;
    small(gpu, "rows_pending", pending);
    return small(gpu, "rows_failed", failed);
}
int nvmlDeviceGetNvLinkState(gpu_t gpu, unsigned link, unsigned *out) {
    unsigned links;
    int code = small(gpu, "nvlinks", &links);
    *out = 1;
    return code ? code : link < links ? 0 : 2;
}
int nvmlDeviceGetMemoryInfo(gpu_t gpu, u64 *sizes) { /* total, free, used, in MiB */
    u64 total = 0, used = 0;
    int code = number(gpu, "memory_total", &total);
    number(gpu, "memory_used", &used);
    sizes[0] = total << 20, sizes[1] = (total - used) << 20, sizes[2] = used << 20;
    return code;
}
struct pci { char old[16]; unsigned numbers[5]; char bus[32]; };
int nvmlDeviceGetPciInfo_v3(gpu_t gpu, struct pci *out) { memset(out, 0, sizeof *out); return answer(gpu, "pci", out->bus, 32); }
struct process { unsigned pid; u64 bytes; unsigned instance, compute; };
static int processes(gpu_t gpu, const char *name, unsigned *count, struct process *out) { /* pid:MiB,pid:MiB */
    char text[512];
    unsigned there = 0, room = *count;
    int code = answer(gpu, name, text, sizeof text);
    if (code) return code;
    for (char *word = strtok(text, ","); word; word = strtok(0, ","), there++)
        if (out && there < room) {
            u64 mib = 0;
            sscanf(word, "%u:%llu", &out[there].pid, &mib);
            out[there].bytes = mib << 20, out[there].instance = out[there].compute = 0;
        }
    *count = there;
    return !there || (out && there <= room) ? 0 : 7;
}
int nvmlDeviceGetComputeRunningProcesses_v3(gpu_t gpu, unsigned *count, struct process *out) { return processes(gpu, "compute", count, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(gpu_t gpu, unsigned *count, struct process *out) { return processes(gpu, "graphics", count, out); }
