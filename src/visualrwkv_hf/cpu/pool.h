/* The threads that compute a token. A token is a few hundred short phases one after the other, and each has to be complete
   before the next begins. OpenMP's barriers wait for threads: where another program has taken a core away, every phase waits
   for the thread that is not running. This pool waits for work: a phase is cut into tasks, a thread takes the next few when
   it is there to compute them, and the caller computes what nobody else has taken.

   A thread without work looks for some for SPIN nanoseconds and then sleeps, and so does a caller that waits for others. */
#include <pthread.h>
#include <signal.h>
#include <time.h>

enum { MOST_THREADS = 256, SPIN = 50000 };

/* Compute the tasks [first, last) of a phase. */
typedef void Tasks(const void *phase, int64_t first, int64_t last);

/* `ticket` is the number of the phase in its upper 32 bits, and how many of its tasks nobody has taken yet in its lower
   ones. Who takes some has seen both, so that a thread that was away cannot take tasks of a phase that it does not know:
   the fields below belong to the phase whose task one holds, for that phase cannot end before. */
static struct {
    uint64_t ticket;
    int64_t unfinished; /* tasks */
    Tasks *run;
    const void *phase;
    int64_t count;
    int threads;                    /* that may take tasks, with the caller */
    int started, sleeping, waiting; /* workers; those that sleep; whether the caller does */
    pthread_mutex_t caller, mutex;  /* held by whose phases these are; for the conditions */
    pthread_cond_t work, done;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .work = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

#define NOW(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define SET(x, value) __atomic_store_n(&(x), (value), __ATOMIC_SEQ_CST)

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

static void rest(void) { /* for some 32 pauses */
    for (int i = 0; i < 32; i++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");
#endif
    }
}

static int64_t left(uint64_t ticket) { return (int64_t)(ticket & UINT32_MAX); }

/* Compute tasks of the current phase until none is left to take. Early parts are large, since memory likes long stretches;
   the last ones are small, so that all threads end at the same time. */
static void take_tasks(void) {
    uint64_t ticket = NOW(pool.ticket);
    while (left(ticket)) {
        int64_t part = left(ticket) / (2 * __atomic_load_n(&pool.threads, __ATOMIC_RELAXED));
        part = part < 1 ? 1 : part;
        if (!__atomic_compare_exchange_n(&pool.ticket, &ticket, ticket - part, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            continue;
        int64_t first = pool.count - left(ticket);
        pool.run(pool.phase, first, first + part);
        if (__atomic_sub_fetch(&pool.unfinished, part, __ATOMIC_SEQ_CST) == 0 && NOW(pool.waiting)) {
            pthread_mutex_lock(&pool.mutex);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.mutex);
        }
        ticket = NOW(pool.ticket);
    }
}

static void *work(void *number) {
    int64_t mine = (int64_t)(intptr_t)number, idle_since = nanoseconds();
    for (;;) {
        if (left(NOW(pool.ticket)) && mine < __atomic_load_n(&pool.threads, __ATOMIC_RELAXED)) {
            take_tasks();
            idle_since = nanoseconds();
        }
        rest();
        if (nanoseconds() - idle_since < SPIN) continue;
        pthread_mutex_lock(&pool.mutex);
        SET(pool.sleeping, pool.sleeping + 1);
        while (!left(NOW(pool.ticket)) || mine >= __atomic_load_n(&pool.threads, __ATOMIC_RELAXED))
            pthread_cond_wait(&pool.work, &pool.mutex);
        SET(pool.sleeping, pool.sleeping - 1);
        pthread_mutex_unlock(&pool.mutex);
        idle_since = nanoseconds();
    }
    return NULL;
}

/* The threads of a process do not survive its fork: the child starts its own. */
static void forget_threads(void) {
    pthread_mutex_init(&pool.caller, NULL), pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work, NULL), pthread_cond_init(&pool.done, NULL);
    pool.started = pool.sleeping = pool.waiting = 0;
    pool.ticket &= ~(uint64_t)UINT32_MAX;
}

/* Start workers until there are threads - 1 of them. Where the system refuses one, fewer compute. */
static void start_threads(int threads) {
    static int is_ready;
    if (!is_ready) is_ready = !pthread_atfork(NULL, NULL, forget_threads);
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (pool.started < threads - 1 && !pthread_create(&thread, NULL, work, (void *)(intptr_t)(pool.started + 1))) {
        pool.started++;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* The phases of one call: begin, share each, end. Where another call has the pool, this one computes alone. */
typedef struct {
    int has_pool;
} Team;

static Team begin_team(int threads) {
    threads = threads > MOST_THREADS ? MOST_THREADS : threads;
    if (threads < 2 || pthread_mutex_trylock(&pool.caller)) return (Team){0};
    if (pool.started < threads - 1) start_threads(threads);
    __atomic_store_n(&pool.threads, threads, __ATOMIC_RELAXED);
    return (Team){1};
}

static void end_team(Team team) {
    if (team.has_pool) pthread_mutex_unlock(&pool.caller);
}

static void wait_for_others(void) {
    int64_t since = nanoseconds();
    while (NOW(pool.unfinished)) {
        rest();
        if (nanoseconds() - since < SPIN) continue;
        pthread_mutex_lock(&pool.mutex); /* leaves this core to the thread that has none */
        SET(pool.waiting, 1);
        while (NOW(pool.unfinished)) pthread_cond_wait(&pool.done, &pool.mutex);
        SET(pool.waiting, 0);
        pthread_mutex_unlock(&pool.mutex);
    }
}

/* Compute all tasks of a phase. */
static void share(Team team, int64_t count, Tasks *run, const void *phase) {
    if (!team.has_pool || count < 2 || count > INT32_MAX) {
        if (count > 0) run(phase, 0, count);
        return;
    }
    pool.run = run, pool.phase = phase, pool.count = count;
    SET(pool.unfinished, count);
    SET(pool.ticket, (((pool.ticket >> 32) + 1) << 32) | (uint64_t)count);
    if (NOW(pool.sleeping)) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.mutex);
    }
    take_tasks();
    wait_for_others();
}
