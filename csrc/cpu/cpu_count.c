#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity */
#endif

#include "cpu_count.h"

#include <ctype.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "threads.h"

#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <sched.h>
#endif

#ifdef __linux__

enum {
    MAX_CPUS = 8192, /* the largest NR_CPUS that Linux can be configured for */
    PATH_SIZE = 4096 + 128,
};

typedef struct cpu_mask {
    cpu_set_t sets[MAX_CPUS / CPU_SETSIZE];
} cpu_mask;

static bool read_line(const char *path, char *line, size_t size) {
    FILE *file = fopen(path, "re");
    if (!file) return false;
    const bool read = fgets(line, (int)size, file) != NULL;
    fclose(file);
    return read;
}

/* The lowest CPU that shares cpu's core: the same number for all its siblings, whether or not we may use them. */
static int first_sibling(const char *root, int cpu) {
    /* The kernel renamed the file in 5.2 and keeps the old name as deprecated. */
    static const char *const names[] = {"core_cpus_list", "thread_siblings_list"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[PATH_SIZE], line[64];
        const int length =
            snprintf(path, sizeof path, "%s/sys/devices/system/cpu/cpu%d/topology/%s", root, cpu, names[i]);
        int first;
        if (length < (int)sizeof path && read_line(path, line, sizeof line) && sscanf(line, "%d", &first) == 1 &&
            first >= 0 && first < MAX_CPUS)
            return first;
    }
    return cpu;
}

static void count_cores(const char *root, qz_cpus *cpus) {
    cpu_mask usable, cores;
    memset(&usable, 0, sizeof usable);
    memset(&cores, 0, sizeof cores);
    if (sched_getaffinity(0, sizeof usable, usable.sets) != 0) return;
    for (int cpu = 0; cpu < MAX_CPUS; cpu++)
        if (CPU_ISSET_S(cpu, sizeof usable, usable.sets)) CPU_SET_S(first_sibling(root, cpu), sizeof cores, cores.sets);
    cpus->usable = CPU_COUNT_S(sizeof usable, usable.sets);
    cpus->cores = CPU_COUNT_S(sizeof cores, cores.sets);
}

/* The quota of one cgroup in CPUs, rounded up; 0 if it has none. Version 2 has "QUOTA PERIOD" or "max PERIOD" in one
   file, version 1 has one file for each and a quota of -1 for none. */
static int group_quota(const char *directory) {
    char path[2 * PATH_SIZE], line[64];
    long long quota = 0, period = 0;
    snprintf(path, sizeof path, "%s/cpu.max", directory);
    if (read_line(path, line, sizeof line)) {
        if (sscanf(line, "%lld %lld", &quota, &period) != 2) return 0;
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", directory);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%lld", &quota) != 1) return 0;
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", directory);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%lld", &period) != 1) return 0;
    }
    if (quota <= 0 || period <= 0) return 0;
    const long long cpus = quota / period + (quota % period != 0);
    return cpus < MAX_CPUS ? (int)cpus : MAX_CPUS;
}

static void keep_smaller(int *quota, int other) {
    if (other > 0 && (*quota == 0 || other < *quota)) *quota = other;
}

/* The smallest quota from the group up to the root of the hierarchy. Levels that do not exist are passed over: in a
   container the path may be the host's while the mount shows the container's own group as its root. */
static int path_quota(const char *root, const char *mount, const char *group) {
    char directory[PATH_SIZE];
    const int top = snprintf(directory, sizeof directory, "%s/sys/fs/cgroup%s", root, mount);
    if (top >= (int)sizeof directory ||
        snprintf(directory + top, sizeof directory - (size_t)top, "%s", group) >= (int)sizeof directory - top)
        return 0;
    int quota = 0;
    for (;;) {
        keep_smaller(&quota, group_quota(directory));
        char *slash = strrchr(directory + top, '/');
        if (!slash) return quota;
        *slash = '\0';
    }
}

static bool lists_cpu(char *controllers) {
    char *rest = NULL;
    for (char *name = strtok_r(controllers, ",", &rest); name; name = strtok_r(NULL, ",", &rest))
        if (strcmp(name, "cpu") == 0) return true;
    return false;
}

/* Lines of /proc/self/cgroup are "id:controllers:path"; version 2 has no controllers there. */
static int cgroup_quota(const char *root) {
    char path[PATH_SIZE], line[PATH_SIZE];
    if (snprintf(path, sizeof path, "%s/proc/self/cgroup", root) >= (int)sizeof path) return 0;
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    int quota = 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = '\0';
        if (*++controllers == '\0') {
            keep_smaller(&quota, path_quota(root, "", group));
            keep_smaller(&quota, path_quota(root, "/unified", group));
        } else if (lists_cpu(controllers)) {
            keep_smaller(&quota, path_quota(root, "/cpu", group));
            keep_smaller(&quota, path_quota(root, "/cpu,cpuacct", group));
        }
    }
    fclose(file);
    return quota;
}

#endif

qz_cpus qz_count_cpus(const char *root) {
    qz_cpus cpus = {0};
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    cpus.online = online > 0 ? (int)online : 1;
#ifdef __linux__
    count_cores(root, &cpus);
    cpus.quota = cgroup_quota(root);
#else
    (void)root;
    cpus.usable = cpus.online;
    size_t size = sizeof cpus.cores;
    if (sysctlbyname("hw.physicalcpu", &cpus.cores, &size, NULL, 0) != 0) cpus.cores = 0;
#endif
    if (cpus.usable < 1) cpus.usable = cpus.online;
    if (cpus.cores < 1) cpus.cores = cpus.usable;
    return cpus;
}

int qz_parallel_cpus(const qz_cpus *cpus) {
    return cpus->quota > 0 && cpus->quota < cpus->usable ? cpus->quota : cpus->usable;
}

/* Like snprintf, at the end of the string in text. */
__attribute__((format(printf, 3, 4))) static void append(char *text, size_t size, const char *format, ...) {
    const size_t used = size ? strlen(text) : 0;
    va_list values;
    va_start(values, format);
    vsnprintf(size ? text + used : NULL, size - used, format, values);
    va_end(values);
}

/* The positive number in an environment variable; 0 if it is unset or empty, -1 if it is something else.
   OMP_NUM_THREADS may be a list, one number for each level of nesting: the first is meant. */
static int number_in(const char *variable, bool list) {
    const char *value = getenv(variable);
    if (!value || !*value) return 0;
    char *end;
    const long number = strtol(value, &end, 10);
    while (isspace((unsigned char)*end)) end++;
    if (end == value || number < 1 || !(*end == '\0' || (list && *end == ','))) return -1;
    return number < INT_MAX ? (int)number : INT_MAX;
}

/* Number and reason where no variable sets it. */
static int describe_cores(const qz_cpus *cpus, char *text, size_t size) {
    const bool limited = cpus->quota > 0 && cpus->quota < cpus->cores;
    int threads = limited ? cpus->quota : cpus->cores;
    threads = threads < QZ_MAX_THREADS ? threads : QZ_MAX_THREADS;
#ifdef __APPLE__
    append(text, size, "%d: physical cores (hw.physicalcpu)", threads);
#else
    append(text, size, "%d: ", threads);
    if (limited) append(text, size, "cgroup CPU quota (rounded up), less than the %d ", cpus->cores);
    append(text, size, "distinct physical cores within the CPU affinity (%d of %d CPUs)", cpus->usable, cpus->online);
    if (cpus->quota == 0)
        append(text, size, ", no cgroup quota");
    else if (!limited)
        append(text, size, ", cgroup quota of %d CPUs", cpus->quota);
#endif
    return threads;
}

int qz_default_threads(const qz_cpus *cpus, char *text, size_t size) {
    static const char *const variables[] = {"QUANTIZATION_NUM_THREADS", "OMP_NUM_THREADS"};
    const char *ignored[2] = {NULL, NULL};
    int threads = 0;
    if (size) *text = '\0';
    for (int i = 0; i < 2 && threads == 0; i++) {
        const int number = number_in(variables[i], i == 1);
        if (number > 0) {
            threads = number < QZ_MAX_THREADS ? number : QZ_MAX_THREADS;
            append(text, size, "%d: %s='%.32s'", threads, variables[i], getenv(variables[i]));
            if (number > threads) append(text, size, ", above the most there can be");
        } else if (number < 0) {
            ignored[i] = variables[i];
        }
    }
    if (threads == 0) threads = describe_cores(cpus, text, size);
    for (int i = 0; i < 2; i++)
        if (ignored[i])
            append(text, size, "; %s='%.32s' is not a positive number, ignored", ignored[i], getenv(ignored[i]));
    return threads;
}
