#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace ebmfast {
namespace {

constexpr int kChunksPerThread = 8;  // small enough that a slow thread does not hold up the rest
constexpr int kMaxThreads = 1024;

struct Job {
    Work work;
    const void* context;
    int64_t units, chunk;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first one, written by whoever set `failed`

    void help() noexcept {
        try {
            for (;;) {
                const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
                if (begin >= units) return;
                work(context, begin, std::min(begin + chunk, units));
            }
        } catch (...) {
            next.store(units);  // nobody takes more
            if (!failed.exchange(true)) error = std::current_exception();
        }
    }
};

class Pool {
public:
    bool try_run(Job& job, int helpers) {
        if (busy_.test_and_set(std::memory_order_acquire)) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; threads_ < helpers; ++threads_) std::thread(&Pool::serve, this).detach();
            job_ = &job;
            open_ = helpers;
        }
        wake_.notify_all();
        job.help();
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = 0;  // who has not come by now is not waited for
        done_.wait(lock, [this] { return running_ == 0; });
        job_ = nullptr;
        busy_.clear(std::memory_order_release);
        return true;
    }

private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return open_ > 0; });
            --open_;
            ++running_;
            Job& job = *job_;
            lock.unlock();
            job.help();
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;  // not a mutex: a nested call may come from the thread that holds it
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int open_ = 0, running_ = 0, threads_ = 0;
};

std::atomic<Pool*> shared{nullptr};

// Never destroyed: its threads may outlive static destructors. A forked child has none of the threads, so it starts anew.
Pool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { shared.store(nullptr); });
    (void)registered;
    Pool* p = shared.load(std::memory_order_acquire);
    if (p == nullptr) {
        Pool* fresh = new Pool;
        if (shared.compare_exchange_strong(p, fresh)) return *fresh;
        delete fresh;
    }
    return *p;
}

}  // namespace

void parallel_for(int64_t units, int threads, Work work, const void* context, int64_t chunk) {
    threads = int(std::min<int64_t>(std::min(threads, kMaxThreads), units));
    if (threads > 1) {
        if (chunk <= 0) chunk = std::max<int64_t>(1, units / (int64_t(threads) * kChunksPerThread));
        Job job{work, context, units, chunk};
        if (pool().try_run(job, threads - 1)) {
            if (job.failed) std::rethrow_exception(job.error);
            return;
        }
    }
    if (units > 0) work(context, 0, units);
}

}  // namespace ebmfast
