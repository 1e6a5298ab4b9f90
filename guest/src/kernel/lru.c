/* The lists of pages that can be reclaimed.
 *
 * Holds: a page is on a list only while somebody holds it (frame_put takes it off), and then FRAME_LISTED is set.
 * Locks: LOCK_PAGES. */
#include "lru.h"

#include "audit.h"
#include "check.h"
#include "locks.h"
#include "task.h"

/* FRAME_NONE ends a list at both ends. */
struct list {
    u32 young, old;
};

static struct list lists[LRU_LISTS];
u32 lru_count[LRU_LISTS];

#define LIST_FLAGS (FRAME_ACTIVE | FRAME_STUCK)

static const u32 flags_of[LRU_LISTS] = {[LRU_ACTIVE] = FRAME_ACTIVE, [LRU_STUCK] = FRAME_STUCK};

static enum lru list_of(const struct frame *frame)
{
    return frame->flags & FRAME_ACTIVE ? LRU_ACTIVE : frame->flags & FRAME_STUCK ? LRU_STUCK : LRU_INACTIVE;
}

void lru_add_held(u32 number, enum lru which)
{
    struct frame *frame = frame_of(number);
    struct list *list = &lists[which];
    ASSERT(!(frame->flags & FRAME_LISTED));
    frame->flags = (frame->flags & ~LIST_FLAGS) | FRAME_LISTED | flags_of[which];
    frame->prev = FRAME_NONE;
    frame->link = list->young;
    if (list->young == FRAME_NONE)
        list->old = number;
    else
        frame_of(list->young)->prev = number;
    list->young = number;
    lru_count[which]++;
}

void lru_add(u32 frame, enum lru list)
{
    pages_take();
    lru_add_held(frame, list);
    pages_give();
}

void lru_remove_held(u32 number)
{
    struct frame *frame = frame_of(number);
    struct list *list = &lists[list_of(frame)];
    if (frame->prev == FRAME_NONE)
        list->young = frame->link;
    else
        frame_of(frame->prev)->link = frame->link;
    if (frame->link == FRAME_NONE)
        list->old = frame->prev;
    else
        frame_of(frame->link)->prev = frame->prev;
    lru_count[list_of(frame)]--;
    frame->flags &= ~FRAME_LISTED;
}

u32 lru_isolate_held(enum lru list)
{
    u32 frame = lists[list].old;
    if (frame != FRAME_NONE) {
        frame_get_held(frame);
        lru_remove_held(frame);
    }
    return frame;
}

void frame_mark(u32 frame, u32 set, u32 clear)
{
    pages_take();
    frame_mark_held(frame, set, clear);
    pages_give();
}

void frame_arrived_held(u32 frame, u32 set, u32 clear)
{
    bool awaited = frame_is(frame, FRAME_AWAITED);
    frame_mark_held(frame, set, clear | FRAME_AWAITED);
    if (awaited)
        task_wake(frame_of(frame));
}

void frame_arrived(u32 frame, u32 set, u32 clear)
{
    pages_take();
    frame_arrived_held(frame, set, clear);
    pages_give();
}

/* Has the end of that wake the frame; false where it has come already. */
static bool await(u32 frame, u32 flags)
{
    pages_take();
    bool away = frame_is(frame, flags);
    if (away)
        frame_mark_held(frame, FRAME_AWAITED, 0);
    pages_give();
    return away;
}

void frame_wait_while(u32 frame, u32 flags)
{
    task_wait_while(await(frame, flags), frame_of(frame));
}

/* Each page that the list has says so, and they are as many as are counted. */
static bool list_is_sound(enum lru which)
{
    u32 count = 0, before = FRAME_NONE;
    for (u32 frame = lists[which].young; frame != FRAME_NONE; before = frame, frame = frame_of(frame)->link, count++) {
        const struct frame *page = frame_of(frame);
        if (count == lru_count[which] || page->prev != before || !(page->flags & FRAME_LISTED) || list_of(page) != which || !page->refs)
            return false;
    }
    return count == lru_count[which] && lists[which].old == before;
}

bool lru_audit(void)
{
    bool sound = true;
    for (u32 which = 0; which < LRU_LISTS; which++)
        sound &= list_is_sound(which);
    return sound;
}
